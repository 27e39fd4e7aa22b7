"""CIFAR networks of the knowledge distillation literature; importing the package registers them with timm."""

from . import cifar_mobilenetv2, cifar_resnet, cifar_shufflenet, cifar_vgg, cifar_wrn
from .convert import convert_state_dict

__all__ = [
    'cifar_mobilenetv2',
    'cifar_resnet',
    'cifar_shufflenet',
    'cifar_vgg',
    'cifar_wrn',
    'convert_state_dict',
]
