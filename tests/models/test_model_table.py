import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import timm_dfpt.models  # noqa: F401

# Parameters, and multiply-accumulates of one 3x32x32 image, of the definitions in RepDistiller and (ResNet-18)
# MDistiller with 100 classes. MACs are those of convolutions and of the classifier's product; biases, norms and
# poolings count nothing.
TABLE = {
    'cifar_resnet8': (83_892, 12_507_392),
    'cifar_resnet14': (181_108, 26_663_168),
    'cifar_resnet20': (278_324, 40_818_944),
    'cifar_resnet32': (472_756, 69_130_496),
    'cifar_resnet44': (667_188, 97_442_048),
    'cifar_resnet56': (861_620, 125_753_600),
    'cifar_resnet110': (1_736_564, 253_155_584),
    'cifar_resnet8x4': (1_233_540, 177_071_104),
    'cifar_resnet32x4': (7_433_860, 1_083_040_768),
    'cifar_resnet18': (11_220_132, 555_468_800),
    'cifar_resnet50': (23_705_252, 1_298_014_208),
    'cifar_wrn_16_1': (180_916, 26_663_168),
    'cifar_wrn_16_2': (703_284, 101_118_464),
    'cifar_wrn_40_1': (569_780, 83_286_272),
    'cifar_wrn_40_2': (2_255_156, 327_610_880),
    'cifar_vgg8': (3_965_028, 96_192_512),
    'cifar_vgg11': (9_277_284, 209_438_720),
    'cifar_vgg13': (9_462_180, 284_936_192),
    'cifar_vgg16': (14_774_436, 398_182_400),
    'cifar_vgg19': (20_086_692, 511_428_608),
    'cifar_mobilenetv2_050': (812_836, 6_523_648),
    'cifar_shufflenetv1': (949_258, 38_691_456),
    'cifar_shufflenetv2': (1_355_528, 44_504_448),
}


@pytest.mark.parametrize('name', TABLE)
def test_parameters_and_macs_are_those_of_the_literature(name):
    model = timm.create_model(name, device='meta').eval()
    parameters = sum(p.numel() for p in model.parameters())
    # The counter takes a multiply-accumulate for two operations.
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, 3, 32, 32, device='meta'))
    assert (parameters, counter.get_total_flops() / 2) == TABLE[name]


def test_table_is_complete():
    assert set(timm.list_models('cifar_*')) == set(TABLE)


def test_no_name_of_timm_is_taken():
    ours = {n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith('timm_dfpt.')}
    assert ours == set(TABLE)
    for module in ('resnet', 'resnetv2', 'vgg', 'efficientnet'):
        assert not ours.intersection(timm.list_models(module=module))
