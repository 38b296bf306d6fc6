"""The entry point of the flex templates' launcher."""

import logging
import sys

from pipeline.dataflow.template.launcher import build_and_submit
from transforms.core.errors import UsageError

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    try:
        logging.info("submitted %s", build_and_submit(sys.argv[1:]))
    except UsageError as error:
        sys.exit(f"pairsift: {error}")  # status 1; the service does not distinguish failures by status
