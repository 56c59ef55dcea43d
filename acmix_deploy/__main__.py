"""``python -m acmix_deploy``, where the console script is not on the PATH."""

import sys

from acmix_deploy.cli import main

sys.exit(main())
