# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """These models are tiny: threads that wait for each other make the tests slow wherever the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
