'use strict';
'require baseclass';
'require form';
'require rpc';
'require ui';
'require uci';

/* What the pages of cgtproxy share. An option here is a key of cgtproxy.conf(5). */

const callStatus = rpc.declare({ object: 'cgtproxy', method: 'status' });
const callApps = rpc.declare({ object: 'cgtproxy', method: 'apps' });
const callCheck = rpc.declare({ object: 'cgtproxy', method: 'check' });
const callHints = rpc.declare({ object: 'luci-rpc', method: 'getHostHints', expect: { '': {} } });
const callNetworks = rpc.declare({ object: 'network.interface', method: 'dump', expect: { 'interface': [] } });

const yes_no = () => [ [ 'yes', _('yes') ], [ 'no', _('no') ] ];
const take = () => [ [ 'yes', _('yes') ], [ 'no', _('no, leave alone') ], [ 'drop', _('drop') ],
	[ 'reject', _('reject') ] ];

function list(lines) {
	return E('ul', {}, lines.map(line => E('li', {}, [ line ])));
}

/* What is wrong in what is saved and not applied, or in force, as { id, severity, text }; what UCI alone
   knows has the id uci. With `exit`, the status of check: 2 where it would be refused. */
function judged(reply) {
	const lines = (reply.uci || []).map(line => /^(error|warning): (.*)$/.exec(line)).filter(found => found);
	const findings = lines.map(found => ({ id: 'uci', severity: found[1], text: found[2] }))
		.concat((reply.check && reply.check.findings) || []);
	// of a rule there are several lines, which one thing may be wrong with
	const first = (finding, at) => findings.findIndex(other => other.text == finding.text) == at;
	return { exit: reply.exit, findings: findings.filter(first) };
}

return baseclass.extend({
	status: () => L.resolveDefault(callStatus(), {}),
	apps: () => L.resolveDefault(callApps(), {}).then(reply => (reply.apps && reply.apps.apps) || []),
	check: () => L.resolveDefault(callCheck(), {}).then(judged),
	hints: () => L.resolveDefault(callHints(), {}),
	networks: () => L.resolveDefault(callNetworks(), []).then(all => all.map(network => network.interface)),

	/* A map, that says where its page decides nothing. */
	map: function(title, description) {
		const by_file = uci.sections('cgtproxy', 'cgtproxy').some(section => section.manual == '1');
		const map = new form.Map('cgtproxy', title, !by_file ? description
			: _('This page is not in force: the configuration is a file of your own, see Settings.'));
		map.readonly = !L.hasViewPermission();
		return map;
	},

	/* Names of targets, those that are always there first. */
	targets: function() {
		const own = [ 'tproxy', 'route' ].flatMap(type => uci.sections('cgtproxy', type));
		return [ 'direct', 'drop' ].concat(own.map(section => section.name || section['.name']));
	},

	/* Adds options to a section, each a row [ name, kind, title, description, values ] where kind is
	   value, list, or choice; a value that is not set has what holds without it as its first word. */
	options: function(section, tab, rows) {
		for (const [ name, kind, title, description, values ] of rows) {
			const type = { value: form.Value, list: form.DynamicList, choice: form.ListValue }[kind];
			const option = tab ? section.taboption(tab, type, name, title, description)
				: section.option(type, name, title, description);
			option.modalonly = (section instanceof form.GridSection) ? true : undefined;
			option.optional = option.rmempty = true;
			if (kind == 'choice')
				option.value('', _('default'));
			else if (typeof(values) == 'string')
				option.placeholder = values;
			if (Array.isArray(values))
				values.forEach(v => option.value(v[0], v[1]));
			option.validate = this.one_line;
		}
	},

	one_line: (id, value) => /[\r\n]/.test(value) ? _('A value is one line') : true,

	/* What every kind of target knows. */
	outlet: () => [
		[ 'tcp', 'choice', 'TCP', null, take() ],
		[ 'udp', 'choice', 'UDP', null, take() ],
		[ 'quic', 'choice', 'QUIC', _('UDP ports 443 and 80; reject makes browsers use TCP at once'), take() ],
		[ 'ipv4', 'choice', 'IPv4', null, take() ],
		[ 'ipv6', 'choice', 'IPv6', null, take() ],
		[ 'tcp_ports', 'list', _('TCP ports'), _('Take these alone'), '80 443 8000-8999' ],
		[ 'udp_ports', 'list', _('UDP ports'), _('Take these alone'), '443' ],
		[ 'bypass', 'list', _('Left alone'), _('Addresses and CIDRs that this target leaves alone'), '203.0.113.0/24' ],
		[ 'bypass_file', 'list', _('Left alone, from files'), null, '/etc/cgtproxy/lan.txt' ],
		[ 'only', 'list', _('Taken alone'), _('Addresses and CIDRs, and nothing else'), '198.18.0.0/15' ],
		[ 'only_file', 'list', _('Taken alone, from files'), null, '/etc/cgtproxy/via.txt' ],
		[ 'dns_hijack', 'list', _('DNS goes to'), _('Where port 53 goes instead'), '127.0.0.1:1053' ],
		[ 'dns_hijack_tcp', 'choice', _('DNS by TCP too'), null, yes_no() ],
		[ 'dns_hijack_local', 'choice', _('DNS of this router too'), null, yes_no() ],
		[ 'mark', 'value', _('Mark'), _('By itself unless it is set'), '0x01000000' ]
	],

	/* A modal, for notifications above the page are not seen. Errors begin with the file that these pages
	   are, unless they are of another one. */
	refuse: function(title, errors) {
		ui.showModal(title, [
			E('p', {}, [ _('What was in force before is in force still.') ]),
			list(errors.map(error => error.replace(/^[^ ]*\/config\/cgtproxy: /, ''))),
			E('div', { 'class': 'right' }, [
				E('button', { 'class': 'btn', 'click': ui.hideModal }, [ _('Dismiss') ])
			])
		]);
	},

	/* Also what the header's own dialog has applied may have been refused. The service may hear of it
	   later than the page is here again, so that is asked for a while; an open dialog is left alone. */
	tell_refused: function(status, times = 8) {
		const open = document.body.classList.contains('modal-overlay-active');
		if (status.refused && status.refused.length && !open)
			this.refuse(_('The last configuration was refused'), status.refused);
		else if (times > 0)
			window.setTimeout(() => this.status().then(now => this.tell_refused(now, times - 1)), 2000);
	},

	/* handleSaveApply of every page: what check refuses is not applied. */
	save_and_apply: function(view, ev, mode) {
		return view.handleSave(ev).then(() => this.check()).then(found => {
			const errors = found.findings.filter(finding => finding.severity == 'error');
			if (found.exit == 2)
				return this.refuse(_('This configuration is refused'), errors.map(finding => finding.text));
			return ui.changes.apply(mode == '0');
		});
	}
});
