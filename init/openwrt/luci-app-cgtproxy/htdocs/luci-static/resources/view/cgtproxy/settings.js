'use strict';
'require view';
'require form';
'require uci';
'require cgtproxy.tools as tools';

return view.extend({
	load: () => Promise.all([ tools.status(), uci.load('cgtproxy') ]),

	render: function([ status ]) {
		const map = tools.map(_('Settings'));
		const s = map.section(form.TypedSection, 'cgtproxy');
		s.anonymous = true;
		s.tab('general', _('General'));
		s.tab('exempt', _('Left alone'));
		s.tab('advanced', _('Advanced'));
		const enabled = s.taboption('general', form.Flag, 'enabled', _('Enabled'));
		enabled.default = '1';
		enabled.rmempty = false;
		const targets = tools.targets().map(name => [ name, name ]);
		tools.options(s, 'general', [
			[ 'default', 'choice', _('Default'), _('Where what no rule covers goes'), targets ],
			[ 'on_exit', 'choice', _('On stop'), _('Keep: what is dropped or proxied stays so while the service does not run'),
				[ [ 'remove', _('remove') ], [ 'keep', _('keep') ] ] ],
			[ 'counters', 'choice', _('Counters'), null,
				[ [ 'target', _('of each target') ], [ 'cgroup', _('of each cgroup too') ] ] ],
			[ 'containers', 'choice', _('Containers'), _('Whether a rule for a container\'s cgroup covers what its network sends'),
				[ [ 'yes', _('yes') ], [ 'no', _('no, leave alone') ] ] ],
			[ 'hold', 'list', _('Held cgroups'), _('Regular expressions on the whole path: nothing below leaves before a rule was looked for'), '/services' ],
			[ 'log_level', 'choice', _('Log level'), null,
				[ 'error', 'warning', 'notice', 'info', 'debug' ].map(level => [ level, level ]) ]
		]);
		tools.options(s, 'exempt', [
			[ 'bypass', 'list', _('Destinations'), _('Addresses, CIDRs, or private'), 'private' ],
			[ 'bypass_file', 'list', _('Destinations, from files'), null, '/etc/cgtproxy/lan.txt' ],
			[ 'bypass_mark', 'list', _('Marks'), _('A proxy\'s own packets'), '0xff' ],
			[ 'bypass_user', 'list', _('Users'), _('A proxy\'s own user'), 'mihomo' ],
			[ 'bypass_dscp', 'list', 'DSCP', null, '4' ]
		]);
		tools.options(s, 'advanced', [
			[ 'cgroup_root', 'value', _('Cgroup root'), null, 'auto' ],
			[ 'route_table', 'value', _('Route table'), null, '300' ],
			[ 'rule_priority', 'value', _('Priority of ip rules'), null, '100' ],
			[ 'fwmark_mask', 'value', _('Mask of marks'), null, '0xff000000' ],
			[ 'include', 'list', _('More files'), null, '/etc/cgtproxy/conf.d/*.conf' ]
		]);
		const manual = s.taboption('advanced', form.Flag, 'manual', _('A file of my own'),
			_('The configuration is that file, and nothing of these pages'));
		manual.default = '0';
		const conffile = s.taboption('advanced', form.Value, 'conffile', _('File'));
		conffile.depends('manual', '1');
		conffile.placeholder = '/etc/cgtproxy/cgtproxy.conf';
		tools.tell_refused(status);
		return map.render();
	},

	handleSaveApply: function(ev, mode) {
		return tools.save_and_apply(this, ev, mode);
	}
});
