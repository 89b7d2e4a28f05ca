"""The collection in ``ansible/``, tried on hosts that are booted for it: ``make test-rollout``.

Each host is a Debian system with systemd and ssh in a container of systemd-nspawn, and all of them are on a bridge in a
network namespace made for the run: nothing of it is seen from outside, and the hosts reach nothing but one another and
the runner, which enters that namespace itself.
"""
