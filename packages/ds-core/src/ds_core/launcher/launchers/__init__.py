"""The launchers of ds-core, registered like anybody's in the group `ds_core.launchers`.

Each turns a `ds_core.launcher.cluster.ClusterJob` into commands for this machine.
"""
