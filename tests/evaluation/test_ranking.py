from lowmem_npo.evaluation.ranking import auc, mean_of_lowest


def test_auc_is_the_share_of_pairs_that_are_in_order():
    assert auc([-3.0, -4.0], [-1.0, -2.0]) == 0 and auc([-1.0, -2.0], [-3.0, -4.0]) == 1
    assert auc([-3.0, -1.0], [-3.0]) == 0.75  # equal ones count half


def test_the_lowest_are_a_share_rounded_down_and_one_at_least():
    assert mean_of_lowest([-1.0, -5.0, -3.0, -2.0, -4.0], 0.4) == -4.5
    assert mean_of_lowest([*[-1.0] * 8, -7.0], 0.2) == -7  # 1.8 of nine
    assert mean_of_lowest([-2.0], 0.4) == -2
