"""ResNet-50 on ImageNet-1k, with [CLS] only, because it has no patches to mask.

    python -m sop_jax.train --config=configs/imagenet_resnet50.py --workdir=runs/resnet50 \
        --config.data.path=DATA_DIR

The data is prepared as for configs/imagenet_vits16.py. The paper has no ResNet: epochs and crops
are those of DINO's command for one (in its README), and everything else is the paper's. This
includes AdamW and the weight decay, for which DINO uses SGD or LARS; which works best with SOP was
not tried. Batch norm normalizes over the whole batch, on any number of devices, but over each
microbatch separately: leave `accumulate` at 1.

Expected after 100 epochs: unknown, because no run of SOP is published. For comparison, DINO-vMF
then has a k-NN accuracy of 59.1 % and a linear probe of 69.6 % (table 11 of KoLeo-proto's paper),
and DINO's released ResNet-50, whose README does not give the number of epochs, 67.5 % and 75.3 %.
Cost, estimated from operation counts and not measured: about 1.7e19 floating-point operations,
which is 12 hours on an H200 at 400 TFLOP/s. Batch norm is limited by memory bandwidth and not
counted, so a run takes longer.
"""

import ml_collections

from sop_jax.recipes import imagenet


def get_config() -> ml_collections.ConfigDict:
    config = imagenet()
    config.epochs = 100.0
    config.augment.global_scale = (0.14, 1.0)
    config.augment.local_scale = (0.05, 0.14)
    config.mask.none = 1.0
    config.model.family = "resnet"
    config.model.size = "50"
    config.model.drop_path = 0.0
    config.sop.patch.tasks = 0
    config.sop.patch.memory = 0
    return config
