"""The sections that recipes build their config from: frozen attrs classes that hold plain values and nothing else.

Names are fairseq2's wherever the meaning is the same. A section may have a method `conflicts`, which yields a
`Problem` for every two values that cannot stand together; its paths are relative to the section.
"""

from fnrecipe.config.sections.adapter import AdapterSection as AdapterSection
from fnrecipe.config.sections.data import AnswersSection as AnswersSection
from fnrecipe.config.sections.data import DatasetSection as DatasetSection
from fnrecipe.config.sections.data import DataSource as DataSource
from fnrecipe.config.sections.data import TokenizerSection as TokenizerSection
from fnrecipe.config.sections.data import source_names as source_names
from fnrecipe.config.sections.evaluation import EvaluationSection as EvaluationSection
from fnrecipe.config.sections.evaluation import evaluation_conflicts as evaluation_conflicts
from fnrecipe.config.sections.model import ModelSection as ModelSection
from fnrecipe.config.sections.optim import CriterionSection as CriterionSection
from fnrecipe.config.sections.optim import LossSection as LossSection
from fnrecipe.config.sections.optim import LRSchedulerSection as LRSchedulerSection
from fnrecipe.config.sections.optim import OptimizerSection as OptimizerSection
from fnrecipe.config.sections.run import ActivationCheckpointingSection as ActivationCheckpointingSection
from fnrecipe.config.sections.run import AverageSection as AverageSection
from fnrecipe.config.sections.run import CommonSection as CommonSection
from fnrecipe.config.sections.run import GangSection as GangSection
from fnrecipe.config.sections.run import MetricRecordersSection as MetricRecordersSection
from fnrecipe.config.sections.run import RegimeSection as RegimeSection
from fnrecipe.config.sections.run import SpikesSection as SpikesSection
from fnrecipe.config.sections.run import TensorBoardSection as TensorBoardSection
from fnrecipe.config.sections.run import TorchSection as TorchSection
from fnrecipe.config.sections.run import TrainerSection as TrainerSection
from fnrecipe.config.sections.run import WandbSection as WandbSection
from fnrecipe.config.sections.transfer import TransferSection as TransferSection
