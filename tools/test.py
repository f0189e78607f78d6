# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import sys

from psaq_mm.commands.test import main

if __name__ == '__main__':
    sys.exit(main())
