"""Imported first: says in one line what the package lacks, where torch is missing."""

from nomatmul._extras import require_train

require_train("nomatmul.models")
