# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import os
import sys

# A script of a checkout runs the checkout's code, installed or not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from psaq_mm.commands.predict import main  # noqa: E402

if __name__ == '__main__':
    sys.exit(main())
