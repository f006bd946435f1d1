"""Operations, parameters and memory by formula, against the traced and compiled step."""

import jax
import pytest
from surveys import GPU, LAPTOP, config_for, survey

from sop_jax.compiled import flops
from sop_jax.own_images import estimate
from sop_jax.own_images.estimate import views_seconds
from sop_jax.parallel.mesh import make_mesh
from sop_jax.training.assemble import assemble, fit_of_step, traced_step


@pytest.mark.medium
@pytest.mark.parametrize(
    "given", [{}, {"model__size": "ti"}, {"sop__cls__supports": 8}, {"augment__local_crops": 0}]
)
def test_operations_and_parameters_are_those_of_the_step(given: dict[str, object]) -> None:
    config = config_for(survey(), LAPTOP, **given)
    run = assemble(config, make_mesh(1, 1, jax.devices()[:1]), 500)
    traced = flops.count(traced_step(run).jaxpr)
    assert estimate.step_operations(config) == pytest.approx(traced, rel=0.15)
    count = sum(leaf.size for leaf in jax.tree.leaves(run.abstract.student))
    assert estimate.parameters(config) == pytest.approx(count, rel=0.03)


@pytest.mark.medium
def test_memory_is_about_that_of_the_compiled_step() -> None:
    config = config_for(survey(), LAPTOP)
    run = assemble(config, make_mesh(1, 1, jax.devices()[:1]), 500)
    wanted = fit_of_step(run).wanted
    assert isinstance(wanted, int)
    assert 0.4 < estimate.memory(config, 1) / wanted < 2.5


def test_images_take_time_from_steps_only_where_they_share_cores() -> None:
    slow = survey(seconds=0.5)
    config = config_for(survey(), LAPTOP)
    fast, both = (estimate.estimate(config, found, LAPTOP) for found in (survey(), slow))
    assert both.seconds > fast.seconds + 0.9 * both.steps * (both.input - fast.input)
    config = config_for(survey(), GPU)
    waiting = estimate.estimate(config, slow, GPU)
    assert waiting.seconds == pytest.approx(waiting.steps * waiting.input)


def test_given_operations_replace_the_formula() -> None:
    config = config_for(survey(), LAPTOP)
    found = estimate.estimate(config, survey(), LAPTOP, 8e10)
    assert found.operations == 8e10
    assert found.compute == pytest.approx(1.0 / estimate.REACHED_ON_CPUS)
    config.model.family = "swin"
    assert estimate.estimate(config, survey(), LAPTOP, 8e10).memory is None


def test_the_time_of_views_is_that_of_making_them() -> None:
    """The function itself: elsewhere in these tests its result is fixed."""
    few, many = (config_for(survey(), GPU, augment__local_crops=n).augment for n in (0, 40))
    assert 0 < views_seconds(few, survey()) < views_seconds(many, survey()) < 60
    assert views_seconds(many, survey()._replace(headers={})) == 0
