"""``python -m tmass_dist.audit``."""

from tmass_dist.audit.command import main
from tmass_dist.cli import run_command

if __name__ == "__main__":
    run_command(main)
