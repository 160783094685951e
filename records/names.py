"""Names of the files in a run's folder."""

from typing import Final

METRICS: Final = "metrics.jsonl"
SUMMARY: Final = "summary.json"
EVENTS: Final = "events.jsonl"
ROLLED_BACK: Final = "rolled_back.jsonl"
HEARTBEAT: Final = "heartbeat.json"
OWNER: Final = "owner.json"
CONFIG: Final = ".hydra/config.yaml"
CHECKPOINTS: Final = "checkpoints"

WATCH: Final = "watch"
"""The folder of questions to the ranks and of their answers."""
REQUEST: Final = "request"
"""In it, what the ranks are asked."""

EVALUATED: Final = "eval_"
"""What fields of an evaluation begin with: its loss, and the task's metrics."""

MOST_RANKS: Final = 1 << 20
"""Of a run that anybody could have made: what lists ranks is bounded by it."""
