"""Contracts: what every attack and every training method promises, as checks that its author can call.

:func:`advmed.testing.attacks.check_attack` and :func:`advmed.testing.methods.check_method` run them all; the lists of
their parts make one test each. A check that fails raises AssertionError. No test framework is needed, but for
:mod:`advmed.testing.lightning`, whose tests are pytest's::

    from advmed.testing.attacks import attack_checks

    @pytest.mark.parametrize(("name", "check"), attack_checks())
    def test_my_attack(name, check):
        check(lambda norm: MyAttack(10, norm=norm))
"""
