"""Hand-written fast paths: the same numbers as the plain ones beside the models, sooner.

Nothing imports this room but where :mod:`vla_trqam.kernel_choice` says "fast", and a copy of the
library without it does everything by ordinary torch. Whoever cares for the mathematics can leave it
unread.
"""
