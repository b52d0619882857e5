/* WHAT    A bounded hand-over between threads: nodes that live inside their owners, first in,
 *         first out.
 * OWNS    Nothing but its lock; a node belongs to who pushed it until it is popped.
 * THREADS Any number on both ends.
 * ERRORS  try_push: false when full or closed.
 * LIMITS  `max` nodes; 0: no bound of its own (each owner has one node, so the owners are the
 *         bound).
 * NEXT    server/call.h */
#pragma once
#include "base/error.h"

typedef struct choir_node {
    struct choir_node *next;
} choir_node;

typedef struct choir_queue choir_queue;

choir_status choir_queue_create(uint32_t max, choir_queue **out) CHOIR_MUST_USE;
void choir_queue_destroy(choir_queue *queue); /* must be empty or its nodes forgotten */
bool choir_queue_try_push(choir_queue *queue, choir_node *node) CHOIR_MUST_USE;
choir_node *choir_queue_pop(choir_queue *queue);     /* waits; NULL once closed and empty */
choir_node *choir_queue_pop_all(choir_queue *queue); /* waits; the whole chain, oldest first */
void choir_queue_close(choir_queue *queue);
