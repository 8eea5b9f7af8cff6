"""Small random models with the stock forward code of LeRobot's policies.

``tiny_pi0`` and ``tiny_pi05`` are policy types of their own (the stock configs cannot be made
small), ``smolvla`` and ``multi_task_dit`` are stock types over a vision-language folder written by
:mod:`~vla_trqam.adapters.tiny.backbones`. Nothing is downloaded.
"""
