"""Homes of the ops: formula, reference, autograd function and public function, one file each."""

from mmpeft_fast.ops.providers import available_providers, provider, provider_report

__all__ = ["available_providers", "provider", "provider_report"]
