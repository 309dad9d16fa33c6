"""Published families, a file each: their config and the names of their tensors, translated."""

from nomatmul.formats.published.hgrn_bit import config_from_published, published_name

__all__ = ["config_from_published", "published_name"]
