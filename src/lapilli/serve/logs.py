"""How a process that serves logs."""

import logging
import warnings


def start_log() -> None:
    """Log to standard error: what happens here, and warnings of others."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of users' pictures; what can't be seen is refused anyway
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("lapilli").setLevel(logging.INFO)
