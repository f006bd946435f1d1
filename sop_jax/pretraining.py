"""Pretrains on a folder of images, for programs and notebooks.

import sop_jax
trained = sop_jax.pretrain(images="photos", workdir="runs/mine")
features = trained.network.features("photos")
"""

import os
import threading
from typing import Any, NamedTuple

from absl import flags
from etils import epath

from sop_jax import config as config_lib
from sop_jax.check import check_used
from sop_jax.compiled.cache import keep_compiled
from sop_jax.errors import UserError
from sop_jax.network import Network, load
from sop_jax.own_images import choices
from sop_jax.parallel import hosts
from sop_jax.paths import expand
from sop_jax.train import train


class Pretrained(NamedTuple):
    """What `pretrain` returns.

    Attributes:
        summary: the final results, as in summary.json.
        network: the teacher of the last step.
    """

    summary: dict[str, Any]
    network: Network


def pretrain(
    images: str | os.PathLike[str], workdir: epath.PathLike, **settings: Any
) -> Pretrained:
    """Trains a network on a folder of images, without labels.

    This does what `python -m sop_jax.train --images=FOLDER --workdir=DIR` does: it chooses all
    settings that are not given for the images and the devices, says which and why, and trains to
    the end. The same call resumes a run that was interrupted, and returns at once what a finished
    run has learnt. Ctrl-C, or interrupting the kernel of a notebook, saves the run and stops it.

    In a script, the call must be below `if __name__ == "__main__":`, because the processes that
    read images import the script. If there are more virtual CPU devices than cores, the call must
    come before the first use of a device, or the environment variable NPROC must be set, see the
    limits in the README.

    Args:
        images: the folder.
        workdir: the folder of the run, which need not exist.
        **settings: settings that are not to be chosen, such as `epochs=20`; those of a section as
            `**{"model.size": "ti"}`.

    Returns:
        The summary, and the network.

    Raises:
        UserError: something is wrong that the user can fix.
        Interrupted: the run was interrupted; its state is saved.
    """
    if not isinstance(images, str | os.PathLike):
        raise UserError(
            f"images is of type {type(images).__name__}; expected the path of a folder of images. "
            "Save the images as files first"
        )
    if threading.current_thread() is not threading.main_thread():
        raise UserError(
            "pretrain was called in another thread than the main one, where it cannot be "
            "interrupted; call it in the main thread, or run python -m sop_jax.train"
        )
    if not flags.FLAGS.is_parsed():  # the processes that read images look at flags of Grain
        flags.FLAGS.mark_as_parsed()
    hosts.enough_threads()
    keep_compiled()
    place = epath.Path(expand(os.fspath(workdir)))
    config, seen = choices.chosen(os.fspath(images), place, settings)
    made = config_lib.read_config(place) if (place / "config.json").exists() else None
    check_used(config, list(settings), made)
    choices.say_cost(config, seen)
    summary = train(config, place, told=seen.survey.notes if seen else ())
    return Pretrained(summary, load(place))
