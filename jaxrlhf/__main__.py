# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxrlhf` is `jaxrlhf`."""

import sys

from jaxrlhf.cli import main

sys.exit(main())
