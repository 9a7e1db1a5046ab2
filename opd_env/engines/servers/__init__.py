"""Servers of vLLM as an engine and as a teacher: token ids in and out over HTTP.

What it is: ``transport`` (one exchange), ``client`` (a pool that retries and moves on), ``protocol`` (what is asked and
answered), ``engine`` (the contract of ``engines.base``).
Stands on: ``engines.base`` and ``engines.models``.
Read first: ``engine``, then ``client``.
Who may change it: sealed; every change with ``pytest tests/engines/servers``, hostile answers included.
"""
