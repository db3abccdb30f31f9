"""Configs are frozen attrs values made of sections; this package reads, checks, merges and writes them. No torch here."""

from fnrecipe.config.layers import resolve as resolve
from fnrecipe.config.sections import ActivationCheckpointingSection as ActivationCheckpointingSection
from fnrecipe.config.sections import AdapterSection as AdapterSection
from fnrecipe.config.sections import AnswersSection as AnswersSection
from fnrecipe.config.sections import CommonSection as CommonSection
from fnrecipe.config.sections import CriterionSection as CriterionSection
from fnrecipe.config.sections import DatasetSection as DatasetSection
from fnrecipe.config.sections import DataSource as DataSource
from fnrecipe.config.sections import GangSection as GangSection
from fnrecipe.config.sections import LossSection as LossSection
from fnrecipe.config.sections import LRSchedulerSection as LRSchedulerSection
from fnrecipe.config.sections import MetricRecordersSection as MetricRecordersSection
from fnrecipe.config.sections import ModelSection as ModelSection
from fnrecipe.config.sections import OptimizerSection as OptimizerSection
from fnrecipe.config.sections import RegimeSection as RegimeSection
from fnrecipe.config.sections import TensorBoardSection as TensorBoardSection
from fnrecipe.config.sections import TokenizerSection as TokenizerSection
from fnrecipe.config.sections import TorchSection as TorchSection
from fnrecipe.config.sections import TrainerSection as TrainerSection
from fnrecipe.config.sections import TransferSection as TransferSection
from fnrecipe.config.sections import WandbSection as WandbSection
from fnrecipe.config.sections import source_names as source_names
from fnrecipe.config.shell import ShellConfig as ShellConfig
from fnrecipe.config.structure import structure as structure
from fnrecipe.config.structure import unstructure as unstructure
