"""Sweeps by Optuna: `metavpt run -m hydra/sweeper=metavpt_optuna 'key=interval(0.1,1.0)'`.

Hydra takes plugins from the namespace `hydra_plugins` alone. Its own plugin for Optuna is tied to
optuna < 3, and that to sqlalchemy < 2.
"""

import logging
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from typing_extensions import override

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler


class OptunaSweeper(Sweeper):
    """Asks Optuna for the options of each job, and tells it what the job returned.

    A range, an interval or a choice on the command line takes the place of one in `params`, and so
    does a fixed value.

    Args:
        sampler: Chooses the options.
        n_trials: Jobs in all.
        n_jobs: Jobs that are asked for before the first of them returns.
        direction: "minimize" or "maximize".
        storage: Where Optuna keeps the study; None: in memory.
        study_name: Its name in the storage.
        params: Option to range, as on the command line.
    """

    def __init__(
        self,
        sampler: "BaseSampler",
        n_trials: int,
        n_jobs: int,
        direction: Literal["minimize", "maximize"] = "minimize",
        storage: str | None = None,
        study_name: str | None = None,
        params: DictConfig | None = None,
    ) -> None:
        self.sampler, self.n_trials, self.n_jobs = sampler, n_trials, n_jobs
        self.direction: Literal["minimize", "maximize"] = direction
        self.storage, self.study_name = storage, study_name
        self.params = params

    @override
    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    @override
    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs, and write the best options to optimization_results.yaml."""
        import optuna

        config, launcher = self.config, self.launcher
        assert config is not None  # setup was called
        assert launcher is not None
        optuna.logging.set_verbosity(logging.WARNING)
        space, fixed = search_space(
            [*(f"{key}={value}" for key, value in (self.params or {}).items()), *arguments]
        )
        study = optuna.create_study(
            study_name=self.study_name,
            storage=self.storage,
            sampler=self.sampler,
            direction=self.direction,
            load_if_exists=True,
        )
        for first in range(0, self.n_trials, self.n_jobs):
            trials = [study.ask(space) for _ in range(min(self.n_jobs, self.n_trials - first))]
            jobs = [
                [*fixed, *(f"{key}={value}" for key, value in trial.params.items())]
                for trial in trials
            ]
            returned = launcher.launch(jobs, initial_job_idx=first)
            for trial, job in zip(trials, returned, strict=True):
                study.tell(trial, float(job.return_value))  # or raises what the job raised
        found: dict[str, Any] = {"best_params": study.best_params, "best_value": study.best_value}
        folder = Path(config.hydra.sweep.dir)
        OmegaConf.save(OmegaConf.create(found), folder / "optimization_results.yaml")


def search_space(overrides: list[str]) -> tuple[dict[str, "BaseDistribution"], list[str]]:
    """Split overrides into those to search over and those that every job has.

    Args:
        overrides: Of two with one key the last one counts.
    """
    parsed = {
        each.get_key_element(): each for each in OverridesParser.create().parse_overrides(overrides)
    }
    space = {key: distribution(each) for key, each in parsed.items() if each.is_sweep_override()}
    fixed = [
        f"{key}={each.get_value_element_as_str()}"
        for key, each in parsed.items()
        if key not in space
    ]
    return space, fixed


def distribution(swept: Override) -> "BaseDistribution":
    """Return Optuna's form of a choice, a range or an interval."""
    kinds: Any = import_module("optuna.distributions")
    value = swept.value()
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        of_ints = isinstance(value.start, int) and isinstance(value.end, int)
        log = "log" in value.tags
        if of_ints:
            return kinds.IntDistribution(int(value.start), int(value.end), log=log)
        return kinds.FloatDistribution(value.start, value.end, log=log)
    options: list[Any] = list(swept.sweep_iterator(transformer=Transformer.encode))
    if isinstance(value, RangeSweep) and all(isinstance(each, int) for each in options):
        step = int(value.step)
        return kinds.IntDistribution(min(options), max(options), step=abs(step))
    return kinds.CategoricalDistribution(options)
