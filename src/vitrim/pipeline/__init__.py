"""The main job end to end: plan, compress, recover, evaluate, measure, save, report.

Each stage leaves its result in OUT/stages before the next begins, so that a run that was stopped goes on at the first
missing one. At the end OUT is itself an artifact, with report.html and summary.json beside it:

    OUT/config.json model.safetensors selection.json provenance.json README.md    the compressed model
    OUT/report.html                     what to look at
    OUT/summary.json                    the same figures for programs; written last
    OUT/stages/config.json              the resolved config
    OUT/stages/{plan,compress,...}.json what each stage found, and the seconds it took
    OUT/stages/compressed, recovered    the models between the stages
    OUT/stages/recover/metrics.jsonl    the training curve

`run_family` makes several budgets at once: a folder like this for each, and a page that compares them.
"""

from vitrim.pipeline.configs import EvaluateConfig, MeasureConfig, RecoverConfig
from vitrim.pipeline.family import FamilyResult, run_family
from vitrim.pipeline.folder import STAGES
from vitrim.pipeline.recovery import recover
from vitrim.pipeline.running import RunResult, run

__all__ = [
    "STAGES",
    "EvaluateConfig",
    "FamilyResult",
    "MeasureConfig",
    "RecoverConfig",
    "RunResult",
    "recover",
    "run",
    "run_family",
]
