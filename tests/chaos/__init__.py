"""Random faults under load, and whether anything is lost, doubled or left behind. See ``--chaos-minutes``."""
