"""`python -m pipeline`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    if sys.path[0] in ("", str(Path.cwd())):
        # Python puts the working directory there, whose files would replace installed modules.
        del sys.path[0]

    from pipeline.cli.main import main

    main()
