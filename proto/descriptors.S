/* The compiled descriptors of every service, for reflection. */
    .section .rodata
    .global choir_proto_descriptors
    .global choir_proto_descriptors_end
    .type choir_proto_descriptors, @object
    .balign 16
choir_proto_descriptors:
    .incbin CHOIR_DESCRIPTOR_SET
choir_proto_descriptors_end:
    .byte 0
    .size choir_proto_descriptors, choir_proto_descriptors_end - choir_proto_descriptors
    .section .note.GNU-stack, "", %progbits
