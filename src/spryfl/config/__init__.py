"""What a run is: small frozen models, one per part, each validates itself.

A run's file is TOML with one table per part; `load_config` reads it, applies overrides and reports
every problem at once, each with its remedy.
"""

from spryfl.config.data import TASK_KINDS, WITH_CLASSES, DataConfig, PartitionConfig, TaskConfig, TaskKind
from spryfl.config.method import GuideConfig, MethodConfig
from spryfl.config.model import ADAPTER_KINDS, AdapterConfig, ModelConfig
from spryfl.config.privacy import PrivacyConfig
from spryfl.config.reading import compared_configs, load_config, load_suite, parse_config, with_overrides
from spryfl.config.run import CompareConfig, RunConfig
from spryfl.config.suite import DatasetEntry, MethodEntry, SearchConfig, SearchRange, SuiteConfig
from spryfl.config.training import ClientsConfig, EvaluationConfig, LocalConfig, RuntimeConfig, ServerConfig

__all__ = [
    "ADAPTER_KINDS",
    "TASK_KINDS",
    "WITH_CLASSES",
    "AdapterConfig",
    "ClientsConfig",
    "CompareConfig",
    "DataConfig",
    "DatasetEntry",
    "EvaluationConfig",
    "GuideConfig",
    "LocalConfig",
    "MethodConfig",
    "MethodEntry",
    "ModelConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "RunConfig",
    "RuntimeConfig",
    "SearchConfig",
    "SearchRange",
    "ServerConfig",
    "SuiteConfig",
    "TaskConfig",
    "TaskKind",
    "compared_configs",
    "load_config",
    "load_suite",
    "parse_config",
    "with_overrides",
]
