"""The flags of every verb, frozen: a new setting of a method is a key of its config, and no flag."""

import click

from vitrim.cli import VERBS, main

FLAGS = {
    "cost": "--against --image-px --json --quiet",
    "methods": "--json --quiet",
    "plan": "--axes --checkpoint --checkpoint-key --data --device --freeze --image-px --images --json --keep-macs --keep-params --max-file-mb --max-macs --max-memory-mb --max-params --mean --method --model --no-pretrained --no-verify --on-broken --product --quiet --score --seed --set --size --std --variant",
    "compress": "--amp --axes --checkpoint --checkpoint-key --config --data --device --epochs --force --freeze --image-px --images --init --json --keep-macs --keep-params --max-file-mb --max-macs --max-memory-mb --max-params --mean --measure --method --model --no-exact-tail --no-measure --no-pretrained --no-verify --on-broken --out --preset --product --quiet --recover-epochs --recover-steps --relative-to --resume --score --search-epochs --search-steps --seed --set --size --std --steps --threads --tie-qk --variant --workers",
    "recover": "--amp --batch-size --config --data --device --epochs --json --lr --mean --objective --on-broken --out --product --quiet --resume --seed --size --std --steps --teacher --threads --workers",
    "train": "--amp --batch-size --checkpoint --checkpoint-key --config --data --device --epochs --json --lr --mean --model --new-head --no-pretrained --no-verify --on-broken --out --quiet --recipe --resume --seed --size --std --steps --threads --workers",
    "evaluate": "--against --amp --batch --checkpoint --checkpoint-key --data --device --json --limit --mean --no-pretrained --no-verify --on-broken --product --quiet --seed --size --skip-broken --split --std --threads --workers",
    "predict": "--checkpoint --checkpoint-key --device --json --mean --no-pretrained --no-verify --on-broken --quiet --size --std --threads --top",
    "measure": "--against --batch --device --dtype --image-px --json --quiet --runs --runtime --threads",
    "report": "--json --out --quiet",
    "export": "--checkpoint --checkpoint-key --force --format --image-px --json --no-pretrained --no-verify --out --quiet",
    "push": "--include-report --json --quiet",
    "doctor": "--json --quiet",
    "demo": "--force --json --out --quiet --threads",
}  # fmt: skip


def verb_named(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def test_the_flags_are_those_that_were_agreed_on() -> None:
    found = {
        name: sorted(flag for option in verb_named(name).params for flag in option.opts if flag.startswith("-"))
        for name in VERBS
    }
    assert found == {name: flags.split() for name, flags in FLAGS.items()}
