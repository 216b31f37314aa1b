"""Names of targets, and that the texts XLA gets say what the table says."""

import re

import pytest

from apr_jax.aot.target import TARGET_NAMES, find_target


@pytest.mark.parametrize("name", [*TARGET_NAMES, "v6e:2x2", "v5e:4x4", "v5p:2x2x2"])
def test_known(name):
    target = find_target(name)
    assert target.name == name
    assert 10**10 < target.device_memory < 10**12
    assert 10**11 < target.device_bandwidth < 10**13


def test_a_chip_of_two_devices_shares_its_memory():
    one, two = find_target("v5p:2x2x1"), find_target("tpu7x:2x2x1")
    assert one.device_memory == 95 * 2**30
    assert two.device_memory == 96 * 2**30
    assert two.device_bandwidth == 7.38e12 / 2


@pytest.mark.parametrize("name", [name for name in TARGET_NAMES if ":" not in name])
def test_texts_agree_with_the_table(name):
    target = find_target(name)
    text = target.topology["target_config"]

    def number(field: str) -> int:
        (found,) = re.findall(rf"\b{field}: (\d+)", text)
        return int(found)

    capability = re.search(r"cuda_compute_capability \{ major: (\d+)(?: minor: (\d+))? \}", text)
    assert capability is not None
    assert target.kernels.compute_capability == (int(capability[1]), int(capability[2] or 0))
    assert target.device_memory == number("device_memory_size")
    assert target.device_bandwidth == number("memory_bandwidth")
    assert target.num_cores == number("core_count")
    assert number("shared_memory_per_block_optin") == number("shared_memory_per_core") - 1024


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v100", "compute capability 7.0, the GPU kernels need 8.0"),
        ("t4", "compute capability 7.5, the GPU kernels need 8.0"),
        ("v3:2x2", "--target=v3:2x2 is not known"),
        ("mi300x", "--target=mi300x is not known"),
        ("v5e", "--target=v5e names no topology: write it as v5e:2x4"),
        ("v5e:2", "names no topology"),
        ("v5e:0x4", "names no topology"),
        ("h200:1x1", "--target=h200:1x1 is not known"),
    ],
)
def test_refused(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_target(name)
