"""Training: plumbing between a system, its data and its optimiser; no formulas."""

from cdlm.training.options import TrainOptions as TrainOptions
from cdlm.training.run import rank_and_world as rank_and_world
from cdlm.training.run import train as train
from cdlm.training.stop import Interrupted as Interrupted
