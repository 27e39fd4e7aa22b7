"""The version of timm_dfpt, read by the build and written into every published file."""

__version__ = '0.1.0'
