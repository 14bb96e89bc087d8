"""`python -m rigpt_hf.cli` is `rigpt`."""

from . import main


main()
