# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Command lines, as installed by the package and called by the scripts in ``tools/``."""
