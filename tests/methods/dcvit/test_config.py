"""A setting that a variant does not look at is refused."""

import pytest

from vitrim.methods.dcvit import DcvitConfig


@pytest.mark.parametrize(
    ("variant", "field"),
    [
        *(
            ("closed", f)
            for f in ({"k": 1}, {"preset": "paper"}, {"steps": 7}, {"metric_images": 7}, {"metric_steps": 7})
        ),
        *(("finetune", f) for f in ({"align": 4}, {"ridge": 0.1}, {"weighted": False}, {"hand_over": True})),
        *(("finetune", f) for f in ({"probe_images": 7}, {"finetune_steps": 7})),
    ],
)
def test_a_setting_that_the_variant_does_not_look_at_is_refused(variant, field):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name}=.* has no meaning in variant '{variant}'"):
        DcvitConfig(variant=variant, **field)
