"""Names of parts that stay as they are."""

from dataclasses import replace

import pytest

from vitrim import architectures
from vitrim.errors import ConfigError
from vitrim.freezing import frozen

SPEC = architectures.spec("deit_tiny_patch16_224")
assert SPEC is not None


def test_names_mean_halves_of_blocks() -> None:
    assert frozen(SPEC, ()) == frozenset()
    assert frozen(SPEC, ("blocks.1-2", "blocks.11.attention")) == {
        (1, "attention"),
        (1, "mlp"),
        (2, "attention"),
        (2, "mlp"),
        (11, "attention"),
    }
    assert frozen(SPEC, ("blocks.0-11.mlp",)) == {(i, "mlp") for i in range(12)}


@pytest.mark.parametrize("name", ["block.1", "blocks.", "blocks.1.attn", "blocks.12", "blocks.3-1", "head", ""])
def test_a_name_that_means_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="freeze="):
        frozen(SPEC, (name,))


def test_a_part_that_is_gone_is_refused() -> None:
    blocks = (replace(SPEC.blocks[0], attention=None), *SPEC.blocks[1:])
    with pytest.raises(ConfigError, match="gone"):
        frozen(replace(SPEC, blocks=blocks), ("blocks.0.attention",))
