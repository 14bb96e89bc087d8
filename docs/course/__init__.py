"""The scripts of the course, installed as `rigpt_hf.course` so that `rigpt lab` finds them; `README.md` says more."""
