"""Bridges to other programs. Nothing of the kit needs them; each stands apart and is imported by name.

``verl`` (tasks, tools and advantages inside verl), ``ray`` (tools and sandboxes on other machines),
``deepspeed`` (training under ZeRO), ``exports`` (evaluations as files of inspect_ai and lm-eval).

Stand on the whole house; nothing below may import them, except by name at run time.
Who may change them: anyone, with the bridge's own tests (``make test-verl``, ``test-ray``, ``test-deepspeed``).
"""
