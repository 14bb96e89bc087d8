"""RiGPT in training engines that are not part of this project; each module needs its engine installed."""
