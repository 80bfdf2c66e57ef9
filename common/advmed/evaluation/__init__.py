"""Models measured clean and under attack: the loop, the metrics, the checks of the attack, the intervals."""
