"""``python -m rewardfuse``, which ``torchrun -m rewardfuse`` and ``accelerate launch -m rewardfuse`` start too."""

import sys

from rewardfuse.cli import main

sys.exit(main())
