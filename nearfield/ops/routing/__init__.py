"""Routing attention: tokens attend to those that point the same way, found by online k-means."""

from nearfield.ops.routing.attention import routing_attention, unrouted_fraction
from nearfield.ops.routing.centroids import Centroids, assign, commitment_loss, ema_update, kmeans_init
from nearfield.ops.routing.decode import Decoded, RoutingCache, routing_attention_decode, routing_cache
from nearfield.ops.routing.geometry import Routing

__all__ = [
    "Centroids",
    "Decoded",
    "Routing",
    "RoutingCache",
    "assign",
    "commitment_loss",
    "ema_update",
    "kmeans_init",
    "routing_attention",
    "routing_attention_decode",
    "routing_cache",
    "unrouted_fraction",
]
