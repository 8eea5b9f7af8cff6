"""Lets failing assertions of the shared contract show their values."""

import pytest

pytest.register_assert_rewrite("contract", "path_contract", "lerobot_contract")
