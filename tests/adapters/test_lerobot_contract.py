import pytest
from lerobot_contract import LeRobotContract

pytestmark = pytest.mark.slow


class TestPI0WithLoRA(LeRobotContract):
    kind, lora = "tiny_pi0", True


class TestPI0InFull(LeRobotContract):
    kind, lora = "tiny_pi0", False


class TestPI05WithLoRA(LeRobotContract):
    kind, lora = "tiny_pi05", True


class TestPI05InFull(LeRobotContract):
    kind, lora = "tiny_pi05", False


class TestSmolVLAWithLoRA(LeRobotContract):
    kind, lora = "smolvla", True


class TestSmolVLAInFull(LeRobotContract):
    kind, lora = "smolvla", False


class TestMultiTaskDiTWithLoRA(LeRobotContract):
    kind, lora = "multi_task_dit", True


class TestMultiTaskDiTInFull(LeRobotContract):
    kind, lora = "multi_task_dit", False
