"""DINO-vMF with ResNet-50 on ImageNet-1k, as in table 11 of "On Partial Prototype Collapse".

    python -m sop_jax.train --config=configs/imagenet_dino_vmf_resnet50.py \
        --workdir=runs/dino_vmf_resnet50 --config.data.path=DATA_DIR

The data is prepared as for configs/imagenet_vits16.py.
Append :kd or :kp to the config file for KoLeo on data or on prototypes, of weight 0.1.

The paper takes its settings from `args.txt` of DINO's released ResNet-50, which is trained with
LARS and batch norm in the head, but for 100 epochs and with 8192 prototypes. The batch of 4080
images is one of 4096 here, which more numbers of devices divide. For fewer devices, DINO's README
recommends a batch of 512 with --config.optim.kind=sgd, --config.optim.lr=0.03 and
--config.optim.min_lr=1e-6. Batch norm normalizes over the whole batch, on any number of devices,
but over each microbatch separately: leave `accumulate` at 1.

Expected after 100 epochs, base / kd / kp: k-NN 59.1 / 59.8 / 60.1 %, linear probe 69.6 / 70.4 /
70.8 %, and 684 / 1373 / 8192 unique prototypes of 8192.
Cost, estimated from operation counts and not measured: about 1.4e19 floating-point operations,
which is 10 hours on an H200 at 400 TFLOP/s. Batch norm is limited by memory bandwidth and not
counted, so a run takes longer.
"""

import ml_collections

from sop_jax.recipes import imagenet, with_vmf


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
    config = imagenet()
    config.method = "dino"
    config.epochs = 100.0
    config.batch_size = 4096
    a = config.augment
    a.global_scale, a.local_scale, a.local_crops = (0.14, 1.0), (0.05, 0.14), 6
    config.model.family = "resnet"
    config.model.size = "50"
    config.model.drop_path = 0.0
    config.head.batch_norm = True
    config.head.batch_norm_views = "together"
    config.dino.prototypes = 8192
    config.dino.temperature_warmup_epochs = 50.0
    o = config.optim
    o.kind, o.lr, o.min_lr, o.clip = "lars", 0.3, 0.0048, 0.0
    o.weight_decay = (1e-6, 1e-6)
    o.momentum = (0.996, 1.0)
    return with_vmf(config, variant)
