"""``advmed search``: the choice of delta, or of any other setting, by AUC_robust on validation data.

A trial is a training by the host's own command and an evaluation by ours, whose report.json is read; nothing in here
knows a host. Optuna keeps the trials (in a file or a database that several machines may share), proposes the settings
of sampler ``tpe``, and hands every trial out once. What is added is what it does not have: commands as trials, and
trials of a process that died, which are taken up again in their own folder.

``plan.py`` the study file, ``curve.py`` what is read from a report, ``claim.py`` whose a trial is, ``command.py`` the
commands, ``trials.py`` Optuna's storage, ``loop.py`` the search, ``table.py`` its table.
"""
