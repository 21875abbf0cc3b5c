"""What local attention costs before it runs, and which pattern each site should get. No tensors."""

from nearfield.plan.choose import Choice, Option, choose, frontier
from nearfield.plan.pattern import GroupPlan, SitePlan, plan_from_json, plan_to_json
from nearfield.plan.reuse import ReusePolicy, best_reuse, fewest_selections
from nearfield.plan.roofline import predict
from nearfield.plan.simulator import Cost, cost

__all__ = [
    "Choice",
    "Cost",
    "GroupPlan",
    "Option",
    "ReusePolicy",
    "SitePlan",
    "best_reuse",
    "choose",
    "cost",
    "fewest_selections",
    "frontier",
    "plan_from_json",
    "plan_to_json",
    "predict",
]
