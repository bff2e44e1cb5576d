import sys

from samlora.cli import main

sys.exit(main())
