import sys

from aimv2_vlm.cli import main

sys.exit(main())
